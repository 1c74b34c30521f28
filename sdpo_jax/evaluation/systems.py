"""The recommenders that are compared, and their names in tables."""

# Those of `sdpo_jax.baselines`, in the order of tables.
TRADITIONAL = {
    "random": "random",
    "popularity": "popularity",
    "gru4rec": "GRU4Rec",
    "caser": "Caser",
    "sasrec": "SASRec",
    "morec": "MoRec",
}
# All that are no stage of a run; results name them where a stage would be.
SYSTEMS = TRADITIONAL | {"chatrec": "ChatRec"}
NAMES = SYSTEMS | {"base": "base", "sft": "SFT"}
