"""The application: programs that train with `lmf_multi`, run as `python -m examples.demo`.

What a person types lies here; what serves it lies in folders: `data`, `models`, `training`, `study`
and `bench`.
"""
