"""The quickstart experiment: DPO towards positive film reviews, from nothing and offline."""
