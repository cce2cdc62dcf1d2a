"""`nextlat evaluate task`: how well exports do the task that a dataset was drawn from."""
