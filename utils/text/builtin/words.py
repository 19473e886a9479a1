"""Words and phrases that fill the built-in stories, by kind."""


def split_words(text: str) -> list[str]:
    """Returns the words of a text."""
    return text.split()


def split_phrases(text: str) -> list[str]:
    """Returns the phrases of a text, which `|` separates."""
    return [" ".join(phrase.split()) for phrase in text.split("|")]


GIRL_NAMES = split_words(
    """
    Ada Amy Anna Bella Clara Cora Daisy Ella Emma Eva Fay Flora Grace Greta Hana Hazel Ida Iris
    Ivy Jane Julia Kate Lena Lily Lola Lucy Maya Mia Mina Molly Nina Nora Olga Pia Rosa Ruby
    Sara Sue Tess Tina Vera Zoe
    """
)
BOY_NAMES = split_words(
    """
    Adam Alex Amir Anton Ben Carl Dan David Eli Emil Finn Fred Gus Hans Henry Hugo Ian Ivan Jack
    Jacob Jim John Jonas Kai Karl Leo Luca Luke Mark Max Milo Nico Noah Oscar Otto Owen Paul
    Pete Ravi Sam Theo Tim Tom Victor Will
    """
)
PET_NAMES = split_words(
    """
    Biscuit Bramble Button Clover Dusty Fern Fuzzy Ginger Honey Jumper Maple Misty Mossy Nibbles
    Peanut Pebble Pepper Pip Pumpkin Rusty Scout Shadow Snowy Spot Sunny Teddy Thimble Willow
    """
)
ANIMAL_HEROES = split_words(
    """
    badger bear beaver cat deer dog donkey duck elephant fox frog goat goose hamster hedgehog
    horse kitten lamb lion monkey otter owl panda penguin pig pony puppy rabbit raccoon sheep
    tiger wolf
    """
)
SMALL_ANIMALS = split_words(
    """
    ant bee beetle bird butterfly caterpillar chick crab cricket dove duckling gosling ladybug
    lizard mole moth mouse newt robin snail sparrow spider squirrel swallow toad turtle
    """
)
TRAITS = split_words(
    """
    brave bright busy careful cheerful clever curious eager friendly funny gentle happy jolly
    kind lively loud merry neat polite quick quiet shy silly smart sweet thoughtful
    """
)
COLORS = split_words(
    """
    black blue brown gold golden gray green orange pink purple red silver striped white yellow
    """
)
LOOKS = split_words(
    """
    big bright fine funny large lovely new nice old pretty round shiny simple small smooth soft
    special tiny wooden
    """
)
TOYS = split_words(
    """
    ball balloon basket bell blanket boat book boot bottle box bracelet bucket button car clock
    coat coin crown cup doll dragon drum feather flag flute hat horn jar kite ladder lamp mask
    mitten necklace pencil pillow puppet puzzle ribbon ring robot rope sack scarf shell shovel
    sled spoon sword top train truck trumpet umbrella wagon watch whistle
    """
)
FOODS = split_words(
    """
    apples apricots bananas berries buns cakes carrots cherries cookies crackers dumplings figs
    grapes muffins noodles nuts oranges pancakes peaches pears pies plums pretzels raisins rolls
    sandwiches strawberries waffles walnuts
    """
)
PLANTS = split_words("bean melon pea pepper pumpkin squash strawberry sunflower tomato tulip")
PLACES = split_phrases(
    """
    at the beach|at the farm|at the fair|at the lake|at the market|at the park|
    at the pond|at the school|at the zoo|by the bridge|by the fountain|by the mill|
    by the old well|by the river|by the sea|by the stream|in the barn|in the big field|
    in the forest|in the garden|in the meadow|in the orchard|in the playground|
    in the square|in the valley|in the village|in the woods|on the hill|on the sand|
    near the castle|near the cave|near the tall tower|near the windmill
    """
)
SPOTS_OUTSIDE = split_phrases(
    """
    behind a barrel|behind a bush|behind a fence|behind a gray stone|behind a wall|
    between two trees|beside a puddle|next to a ditch|beside a hollow log|
    in a patch of clover|by a muddy path|in the tall grass|next to a stump|behind a bench|
    under a hedge|under a pile of leaves|under a pine tree|under an old cart|
    under an oak tree
    """
)
SPOTS_INSIDE = split_phrases(
    """
    behind the clock|behind the curtain|behind the door|in a drawer|in the closet|
    in the cupboard|under the bed|under the carpet|under the pillow|under the sofa|
    under the stairs|under the table
    """
)
WEATHER = split_phrases(
    """
    the sun was shining|the sky was clear and blue|a soft wind was blowing|the air was warm|
    it was cold and bright|a little rain was falling|white clouds sailed across the sky|
    the leaves were turning red|the birds were singing|the grass was wet with dew|
    snow lay on the roofs|a thin fog hung over the ground|bees hummed in the flowers|
    it was hot and still|the wind smelled of hay
    """
)
CHORES = split_phrases(
    """
    brush the pony|carry the wood inside|clean the windows|close the gate|feed the hens|
    fold the towels|lock the shed|pick the beans|polish the spoons|rake the leaves|
    set the table|sweep the kitchen floor|tidy the attic|wash the dishes|water the flowers|
    wind the old clock
    """
)
SKILLS = split_phrases(
    """
    bake bread|catch a ball|climb a rope|count to a hundred|dance|draw a horse|fly a kite|
    juggle|paint a tree|play the drum|play the piano|read|ride a bike|skate|skip|
    spell long words|swim|tie a knot|whistle a tune|write a letter
    """
)
SCARY_SOUNDS = split_phrases(
    """
    a clap of thunder|a long howl|a loud bang|a low growl|a scratching sound|
    a strange hoot|a tapping at the window|the creak of a door|the roar of the wind
    """
)
HARMLESS_CAUSES = split_phrases(
    """
    only the cat|only the old oak tree|only a branch in the wind|
    only an owl looking for its supper|only a loose shutter|only the neighbor's sleepy dog|
    only the rain on a tin bucket|only a mouse with a nut
    """
)
DAYS = split_phrases(
    """
    afternoon|day|fine day|fine morning|long afternoon|morning|quiet day|quiet morning|
    Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday
    """
)
CROCKERY = split_words("bowl cup glass jar jug lamp mug pitcher plate pot teapot vase")
NUMBERS = split_words("two three four five six seven eight nine ten twelve")
WOMEN = split_words("aunt grandma grandmother mom mother")
MEN = split_words("dad father grandfather grandpa uncle")
GLAD_WORDS = split_words("cheerful delighted glad happy joyful pleased proud thrilled")
SAD_WORDS = split_words("gloomy lonely miserable sad sorry unhappy upset")
