"""What a third party's distribution holds: an objective that drafts. Imported as `toy_entry`, `toy_guess`."""
