"""Serves a model: to many people at once (`program`), or to one through moshi's own server (`stock`)."""
