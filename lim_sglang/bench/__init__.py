"""`lim bench`: what a decode step costs, and where its time goes."""
