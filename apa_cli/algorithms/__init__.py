"""The algorithms: one short module each. A new one is a module here (or anywhere) and one yaml in conf/algo."""
