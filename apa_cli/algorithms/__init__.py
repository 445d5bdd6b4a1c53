"""The algorithms, one short module each. A new one is a module, here or elsewhere, and a yaml in conf/algo."""
