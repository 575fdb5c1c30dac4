"""Where rows come from: words of the command line to sources, files to records."""
