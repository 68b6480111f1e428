"""What leaves for the hospital: a package, how it is made (`export`, needs [train]) and used (`predict`, light)."""
