//! Workers in Python read and write the same rows with their own client: `tests/interop.py`.
