"""Side-by-side timings of the trainer and hand-written loops; `make bench` runs the short form."""
