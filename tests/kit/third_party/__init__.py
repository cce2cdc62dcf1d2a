"""A third party's distribution: an objective that drafts. Imported as `toy_entry`, `toy_guess`."""
