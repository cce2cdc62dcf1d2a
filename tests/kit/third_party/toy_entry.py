"""The entry of the objective `guess`: next-token prediction, and a guess of the token after the next. Torch-free."""

from nextlat_dist.config.entries import ObjectiveEntry, Sharding, Term

GUESS = ObjectiveEntry(
    name="guess",
    module="toy_guess:GuessObjective",
    terms=(Term("guess", "options.lambda_guess", "nextlat_dist.objective.masks:token_mask"),),
    steps_ahead=lambda objective: 1,
    parts={"guess": ("guess layers", "them")},
    parameters=lambda config, sizes: {"guess": 2 * config.model.hidden_size**2},
    flops=lambda config, sizes: 6.0 * (2 * config.model.hidden_size**2 + sizes.head),
    sharding=lambda config: {"guess.linear_in.weight": Sharding(0), "guess.linear_out.weight": Sharding(1)},
    options={"lambda_guess": 0.5},
    drafter="guess",
)
