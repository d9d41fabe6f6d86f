"""The config turned into objects: the only library files, beside config.py and fields.py, that see a ConfigDict. Everything below gets numbers, names
and functions."""
