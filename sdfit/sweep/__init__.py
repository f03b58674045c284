"""From a grid to records: run workloads in processes of their own and keep what came of them."""
