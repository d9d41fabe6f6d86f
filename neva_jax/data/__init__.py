"""Records -> conversation -> tokens -> plan -> batch. numpy, Pillow and Grain only: no file here imports JAX, so that a worker starts no backend."""
