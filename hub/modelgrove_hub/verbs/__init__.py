"""What a hub can be asked. The command line, the REST API and the web page all say it through these functions."""
