"""Families of backbones: where each is listened to. :mod:`~e3va_mm.families.registry` has the table of them."""
