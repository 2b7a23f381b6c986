"""`jaxtrainer fit|validate|test|predict|plan`: a run from options and files, by jsonargparse."""
