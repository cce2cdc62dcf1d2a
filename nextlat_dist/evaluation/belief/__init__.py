"""`nextlat evaluate belief`: are hidden states belief states?"""
