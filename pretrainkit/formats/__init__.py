"""Token file formats, one file each: what every one of them reads and writes is tokens and where documents end."""
