"""What every room uses: files, errors, ranks."""
