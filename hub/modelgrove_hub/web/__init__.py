"""The web page: server-rendered, readable without JavaScript, made of the same verbs as the command line and REST."""
