"""Glue to other libraries, none of which is imported before it is asked for."""
