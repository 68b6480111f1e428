"""DICOM node of `medim serve`: receives series, answers each one once with a package, and sends the answers on."""
