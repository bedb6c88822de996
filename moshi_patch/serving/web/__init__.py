"""Websockets, tickets, limits, the page and what operators see: who may come in, and moshi's protocol."""
