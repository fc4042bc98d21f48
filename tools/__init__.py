"""What surrounds the model repository: export, the embedded server, the demo data and the benchmarks."""
