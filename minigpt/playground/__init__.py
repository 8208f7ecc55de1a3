"""Local web page that shows the stories of models and what happens inside them."""
