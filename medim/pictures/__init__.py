"""Pictures of images and label maps, drawn with Pillow in every installation."""
