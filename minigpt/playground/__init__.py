"""The local web page: tell stories and look inside."""
