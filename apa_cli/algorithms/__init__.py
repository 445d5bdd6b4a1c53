"""The algorithms, one short module each. A new algorithm is a module, here or elsewhere, and a yaml in conf/algo."""
