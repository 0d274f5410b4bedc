# ruff: noqa: E501, SIM905 - one pattern a line, one list of names a text
"""The names, things and sentence patterns of :mod:`d2obench.texts.writer`, all written for this project.

A pattern is plain text with two kinds of marks. ``[a|b|c]`` stands for one of its alternatives, which may contain marks
themselves. ``{slot}`` is filled in by the writer:

* ``p`` and ``q`` are the full names of the paragraph's two people, ``n`` and ``m`` their first names;
* ``he``, ``his`` and ``him`` are the pronouns of ``p``;
* ``home``, ``job`` and ``born`` are facts about ``p``, ``home2`` and ``job2`` about ``q``;
* ``town``, ``place``, ``thing``, ``goods``, ``food``, ``when``, ``month``, ``day``, ``year``, ``few``, ``many`` and
  ``sum`` are drawn anew.

``a`` becomes ``an`` before a vowel.
"""

from __future__ import annotations

WOMEN = (
    "Ada Agnes Beatrix Clara Dorothea Edith Elsbeth Flora Greta Hanna Ingrid Johanna Katrin Leonora Liv Mabel Margit "
    "Martha Nora Olive Petra Rosalind Ruth Sabine Selma Sigrid Sylvia Thea Ursula Vera Winifred Yvonne"
).split()
MEN = (
    "Albert Anton August Benedict Bruno Caspar Conrad Edgar Emil Felix Ferdinand George Gustav Henry Hugo Isaac Jakob "
    "Jonas Karl Leopold Ludwig Magnus Martin Nils Oskar Otto Paul Rupert Samuel Simon Theodor Walter"
).split()
SURNAMES = (
    "Abernathy Alder Ashby Barlow Bergstrom Birch Blackwood Bramley Brandt Carver Castellan Coldwell Corbett Cray "
    "Dahl Dorset Drummond Eastman Ekdal Farrow Fenwick Finch Gallow Garrick Granger Hale Halloran Harker Hartwell "
    "Hawthorne Holm Ivarsen Jessop Kestrel Kingsley Lachlan Lindqvist Lockwood Marlow Mercer Moberg Morland Nyman "
    "Oakes Osterman Pascoe Pemberton Quill Radcliffe Ravn Redfern Rosing Sandvik Sayer Selby Sorrel Stroud Tarrant "
    "Thorne Tolliver Underhill Vane Verner Voss Wakefield Westergaard Whitlock Winslow Wren Yardley Zeller"
).split()
TOWN_HEADS = (
    "Ald Amber Ash Bel Brack Brin Carn Cold Dun Elder Fal Fern Glen Hal Har Hazel Iron Kel Lang Lin Mar Mill Nor Oxen "
    "Pen Raven Rock Salt Sil Stan Thorn Tor Wel Wen Whit Wind"
).split()
TOWN_TAILS = (
    "borough bridge brook bury cliff dale fell field ford gate haven holm mere mouth stead vale wick worth".split()
)

TRADES = (
    "baker", "bookbinder", "botanist", "bricklayer", "cabinet maker", "carpenter", "chemist", "clockmaker", "cook",
    "cooper", "customs officer", "dentist", "doctor", "ferryman", "fisherman", "gardener", "glassblower",
    "goldsmith", "harbour pilot", "innkeeper", "journalist", "judge", "lawyer", "librarian", "lighthouse keeper",
    "locksmith", "map maker", "mason", "midwife", "miller", "miner", "notary", "nurse", "organ builder", "painter",
    "photographer", "piano tuner", "postmaster", "potter", "printer", "saddler", "sailmaker", "schoolteacher",
    "shepherd", "shipwright", "shoemaker", "stonecutter", "surveyor", "tailor", "telegraph clerk", "translator",
    "watchmaker", "weaver",
)  # fmt: skip
BEASTS = ("dog", "cat", "grey horse", "goat", "parrot", "donkey", "raven", "tame fox", "tortoise", "white goose")
PETS = (
    "Acorn Barnaby Biscuit Bramble Button Captain Cinder Clover Copper Domino Ember Fiddle Ginger Hazel Hector Juniper "
    "Lantern Marble Mustard Nettle Nutmeg Orlando Pepper Pilgrim Pippin Quince Rascal Rusty Saffron Scout Silver Smoke "
    "Sparrow Sultan Thimble Thistle Tinker Truffle Velvet Willow"
).split()
PLACES = (
    "bakery", "boathouse", "bridge", "bank", "cattle market", "chapel", "corn exchange", "customs house", "fish market",
    "graveyard", "harbour", "hospital", "inn", "library", "lighthouse", "mill", "museum", "observatory", "old quarry",
    "orchard", "post office", "printing shop", "railway station", "reading room", "salt works", "school", "shipyard",
    "tannery", "theatre", "town hall", "upper meadow", "walled garden", "watchtower", "weaving shed",
)  # fmt: skip
ADJECTIVES = (
    "battered", "blue", "borrowed", "brass", "broken", "carved", "cheap", "crooked", "dusty", "empty", "expensive",
    "faded", "forgotten", "green", "heavy", "iron", "leather", "little", "long", "narrow", "new", "old", "painted",
    "polished", "red", "rusty", "silver", "small", "strange", "tin", "unfinished", "velvet", "wooden", "yellow",
)  # fmt: skip
THINGS = (
    "accordion", "almanac", "barometer", "basket", "bell", "birdcage", "bottle", "box", "broom", "candlestick", "chair",
    "chessboard", "clock", "coat", "compass", "desk", "drum", "fiddle", "hammer", "hat", "key", "kettle", "ladder", "lamp",
    "ledger", "letter", "map", "medal", "microscope", "mirror", "notebook", "portrait", "purse", "ring", "rope", "saddle",
    "scarf", "stove", "suitcase", "table", "telescope", "trunk", "umbrella", "violin", "wheel",
)  # fmt: skip
GOODS = (
    "apples", "barley", "bricks", "candles", "cheese", "coal", "copper wire", "dried fish", "flax", "glass", "honey", "lamp oil",
    "lead pipe", "linen", "nails", "oats", "paper", "potatoes", "rope", "rye", "salt", "slate", "soap", "tar", "timber",
    "wax", "wool",
)  # fmt: skip
FOOD = (
    "barley soup", "bread and cheese", "cold mutton", "herring with onions", "mushroom pie", "pancakes", "pea soup",
    "plum cake", "roast chicken", "stewed pears", "smoked eel", "a bowl of porridge", "black bread and butter",
)  # fmt: skip
WHEN = (
    "after supper", "at first light", "at noon", "before breakfast", "early the next morning", "in the afternoon",
    "late in the evening", "on market day", "on the following Sunday", "shortly before midnight", "that same week",
    "the day after", "toward evening", "two days later", "while the church bells rang", "when the rain had stopped",
)  # fmt: skip
MONTHS = "January February March April May June July August September October November December".split()
FEW = "two three four five six seven eight nine ten eleven twelve".split()

INTRODUCTIONS = (
    "{p} was born in {home} in the [spring|summer|autumn|winter] of {born} and [trained|found work|made a living] as a {job}.",
    "Nobody in {home} was [better known|more respected|more often asked for advice] than {p}, a {job} who had been born in {born}.",
    "{p}, a {job} from {home}, was born in {born}, [the year of the great flood|a year of poor harvests|"
    "the same year the railway came|in the hardest winter anyone could remember].",
    "In {home} there lived a {job} by the name of {p}, born in {born}, [and the whole street knew {him}|"
    "about whom many stories were told|whom everybody trusted with their keys].",
)
"""Sentences that introduce a person with the facts that are repeated later: town, trade and year of birth."""

RETURNS = (
    "It was {p} again, the {job} from {home}, who [had the answer|brought the news|asked the awkward question].",
    "[As has been said|As the reader may remember|It has been mentioned before that] {p} lived in {home} and worked as a {job}.",
    "{p}, who had been born in {born} and had never been happy away from {home}, [now came back into the story|"
    "heard about it last of all|took no part in this at first].",
    "By then {p}, the {job}, was [no longer young|known far beyond {home}|tired of explaining that {he} came from {home}].",
    "Those who had known {p} since {born} [were not surprised|could only laugh|said that a {job} could do no less].",
)
"""Sentences that return to a person who was absent for long and repeat these facts."""

OPENINGS = (
    "{when} {p} [met|ran into|sent for|called on] {q} at the {place}, [as had been agreed|without a word of explanation|"
    "and both were late].",
    "In {month} of {year} {p} [rented|bought|inherited|looked after] the {place}, and {q} [helped|disapproved|kept the accounts].",
    "{p} [had never liked|was fond of|could not do without] {q}, [least of all in {month}|and everybody in {town} knew it|"
    "but there was work to do].",
    "[One evening|One morning|Some time] in {month}, {p} and {q} [were seen|stood waiting|sat down to {food}] near the {place}.",
)
"""Sentences that begin a paragraph about people who were mentioned lately."""

ACTIONS = (
    "{when} {n} [walked|went|hurried|drove] to the {place} [to fetch|to look for|to return|to pay for] a {thing}.",
    "{he} [put down|picked up|wrapped|hid] the {thing} and [said nothing|waited|looked out of the window|counted to {few}].",
    "{n} [sold|bought|ordered|weighed] {many} sacks of {goods} [at the {place}|on behalf of {m}|for {sum} crowns].",
    "There was [hardly anybody|a small crowd|a smell of smoke|a great deal of noise] at the {place} when {n} arrived.",
    "{he} [wrote|dictated|tore up|burned] a letter to {q}, [in which {he} asked about the price of {goods}|"
    "which ran to {few} pages|and nobody ever learned what was in it].",
    "{q} [came|rode|travelled] from {home2} [to help|to complain|to see the {thing}|with bad news] and stayed for {few} days.",
    "The {thing} had [once belonged to|been a present from|been repaired by] {q}, the {job2} from {home2}.",
    "{n} and {m} [argued|talked|sat in silence] for {few} hours about [the price of {goods}|the road to {town}|a broken {thing}].",
    "They [ate|shared|were served] {food} at the inn, and {m} [paid|told the story of the {thing}|fell asleep at the table].",
    "On {day} {month} {n} [set out|left|took the coach] for {town}, a journey of {few} days in [good|bad] weather.",
    "{he} [repaired|cleaned|measured|drew] the {thing} [twice|with great care|without any hurry], because "
    "[it would be needed|{m} had asked for it|that was how {he} had been taught].",
    "[The mayor|The priest|A neighbour|An inspector|A stranger] [asked|wanted to know|wondered] whether {n} had seen a {thing}, "
    "and {he} [shook {his} head|pointed to the {place}|answered that {he} had not].",
    "Since the {place} was [closed|being painted|full of {goods}], they met [in the {place}|on the road to {town}|at {m}'s house].",
    "{n} [did not believe|had always believed|had to admit] that [a {thing} could be worth {sum} crowns|"
    "the {place} was haunted|{town} was a better place to live].",
    "The work [took|lasted] {few} weeks, cost {sum} crowns and [pleased nobody|was praised in the newspaper|made {n}'s back ache].",
    "{m} [laughed|frowned|shrugged] and said that [such things happened in {town} too|a {job} ought to know better|"
    "there was nothing wrong with the {thing}].",
    "Of the {many} people who [worked|waited|gathered] at the {place}, only {few} [had seen the {thing}|knew {n} by name|came from {town}].",
    "{when} a [cold|warm|salt|sudden] wind came [over the hills|from the sea|down the valley], and {n} [closed the shutters|"
    "thought of {town}|lit the lamp].",
    "If {m} had not [lost|sold|mentioned] the {thing}, {n} would [never have gone to {town}|have stayed at home|still have {sum} crowns].",
    "{n} had [learned|heard|read] that the {place} in {town} [was for sale|had burned down|needed a {job2}].",
    "[Snow|Fog|Rain|A fine dust] lay over the {place}; {n} could [hardly see|just make out|not find] the way to {town}.",
    "For {few} days nothing [happened|was heard of {m}|moved on the river], and then, {when}, the {thing} was found in the {place}.",
    "It [was|had been] {m} who taught {n} how to [mend|judge|carry|value] a {thing}, in a back room of the {place}.",
    "{he} kept the {thing} under the bed, beside {few} [books|boxes|bottles] and a bag of {goods}.",
    "The cart, loaded with {goods} and [driven by|followed by|hidden from] {m}, [got stuck near|passed|never reached] the {place}.",
)
"""What people do; most sentences of a text."""

SPEECH = (
    '"[Have you seen|Where did you put|Who gave you] the {thing}?" asked {n}. "[I left it at the {place}|'
    'Ask {m}, not me|You sold it yourself, in {month}]," [said|answered] {m}.',
    '"[It will rain|Winter comes early|The bread is better] in {town}," {m} said, "[you will see|mark my words|so take your coat]."',
    '"{sum} crowns for a {thing}!" {n} [cried|exclaimed|whispered]. "[My father paid {few}|I would not give half|'
    'And it is not even finished]."',
    '"I have [waited|worked|saved] {few} years for this," said {n}, and {he} [meant it|smiled|put the {thing} on the table].',
    "{m} [asked|wanted to know] what a {job} [earned in a year|did all winter|thought of the new {place}]. "
    '"[Enough|Less than you think|That depends on the {goods}]," said {n}.',
)

THOUGHTS = (
    "[People|Old friends|Good neighbours] [forget|forgive] [slowly|in their own way|more than they admit], and {home} was no exception.",
    "Nothing [weighs|costs] as much as [a promise|a borrowed {thing}|an unpaid debt], {n} [used to say|thought|wrote in the margin].",
    "[Years later|Much later|When it was all over] {n} would [remember|describe|miss] [the light on the water|the smell of {goods}|"
    "the sound of the {place}] better than [the people|the words|the reason for it].",
    "Whether this was [luck|skill|patience] is hard to say; [in {town} they called it luck|{m} called it stubbornness|"
    "the newspaper did not mention it].",
    "[What mattered|What counted|The only question] was [who would pay|how far it was to {town}|whether the {thing} would hold].",
)

HEADINGS = (
    "The [Winter|Spring|Summer|Autumn] of {year}", "A Visit to {town}", "The {place}", "News from {town}", "A Matter of {goods}",
    "The Road to {town}", "What {m} Said",
)  # fmt: skip
