"""`nextlat evaluate probes`: what hidden states say about the tokens to come."""
