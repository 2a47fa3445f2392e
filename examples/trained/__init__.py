"""What is done with the network of a finished run, of any framework: see `examples.predict`."""
