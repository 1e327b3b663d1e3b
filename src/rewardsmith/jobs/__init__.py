"""Job processes: `dispatcher` gives queued jobs one, `local` runs them on this machine, `entry` is that process."""
