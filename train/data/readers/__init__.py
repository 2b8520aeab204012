"""Readers of annotation formats: mask images, list files, COCO JSON, labelme JSON and YOLO text."""
