"""The system check: is this machine ready, and is that checkpoint whole, consistent and active?"""
