"""Moshi's own server, for one person: what the patch adds around its chat handler."""
