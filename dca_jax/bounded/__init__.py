"""Other people's programs and files, run and read in a process of their own: bounded, and apart."""
