from .stream import compress_slide, compress_to_store, is_up_to_date

__all__ = ["compress_slide", "compress_to_store", "is_up_to_date"]
