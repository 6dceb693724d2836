"""One model and one text in; what each scale attended to out."""
