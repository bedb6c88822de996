"""What people read of the results: tables (`blocks` registers them, `page` puts them into a page) and figures."""
