"""`nextlat report`: what one run left behind, merged onto a page."""
