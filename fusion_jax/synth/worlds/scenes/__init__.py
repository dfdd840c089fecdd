"""Makes drawn scenes, the embedded backend's world of things in settings."""
