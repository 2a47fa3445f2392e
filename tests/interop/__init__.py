"""The losses inside other packages, and against them; `nox -s interop` installs those."""
