"""Names and files of fields as users write them."""
