"""What `bench_loss` measures in each framework."""
