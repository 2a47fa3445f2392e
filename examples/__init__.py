"""The application: programs that train with `lmf_multi`, run as `python -m examples.demo`."""
