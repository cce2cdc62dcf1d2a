"""`nextlat report`: the measurements of one run, merged onto a page."""
