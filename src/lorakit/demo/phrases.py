"""The words of the demo's orders: sentence templates, a menu, names. Data only.

`{items}`, `{name}` and `{time}` are the slots. Whether a template is for training, validation or test goes by its place
in its list (see `orders`), so lists are only ever added to at their end.
"""

OPENINGS = (
    "",
    "hi, ",
    "hello, ",
    "hey, ",
    "hi there, ",
    "good evening, ",
    "good afternoon, ",
    "hello there, ",
    "excuse me, ",
    "right, ",
)

ORDERS = (
    "I'd like {items}, please.",
    "can I get {items}?",
    "could we have {items}?",
    "I want to order {items}.",
    "we'll take {items}.",
    "give me {items}, if you would.",
    "put me down for {items}.",
    "I was hoping to order {items}.",
    "may I have {items}, please?",
    "let's go with {items}.",
    "I need {items} tonight.",
    "an order of {items}, thanks.",
    "would you make us {items}?",
    "we are in the mood for {items}.",
    "send us {items}, please.",
    "it's going to be {items} for us.",
    "I'll have {items} today.",
    "the kids would love {items}.",
    "my order is {items}.",
    "please get {items} ready for me.",
    "how about {items}?",
    "we are hungry, so {items} it is.",
    "I am calling to order {items}.",
    "just {items} for me.",
    "same as always: {items}.",
    "we have decided on {items}.",
    "my friends and I want {items}.",
    "is it too late to order {items}?",
    "do me {items}, would you?",
    "make it {items} this time.",
    "what I would like is {items}.",
    "today we are having {items}.",
    "start us off with {items}.",
    "for dinner we would like {items}.",
    "I fancy {items}.",
    "the office is ordering {items}.",
    "add {items} to my order, nothing else.",
    "I could really go for {items}.",
    "could you prepare {items} for us?",
    "one order: {items}.",
    "my wife asked for {items}.",
    "it's for a small party: {items}.",
    "I'm after {items}.",
    "would {items} be possible?",
    "we'd be happy with {items}.",
    "book me in for {items}, thanks.",
    "I have a craving for {items}.",
    "as for food, {items} will do.",
    "kindly prepare {items}.",
    "I should like to order {items}.",
    "that will be {items}, please.",
    "ring up {items} for me.",
    "long day here, I need {items}.",
    "so we settled on {items} in the end.",
    "everyone agreed on {items}.",
    "we can't wait for {items}.",
)

# By what is said: (delivery, with a time, with a name) -> templates.
ARRANGEMENTS = {
    (True, True, True): (
        "Deliver it to {name} at {time}.",
        "Bring it round at {time}, the name is {name}.",
        "It's for {name}, delivered at {time} please.",
        "Please deliver by {time}, ask for {name}.",
        "My name is {name} and I want it delivered for {time}.",
        "Drop it off at {time} and ring for {name}.",
        "Delivery at {time} to {name}, please.",
        "Can the driver be here at {time}? {name} is on the door.",
        "{name} here, deliver it at {time}.",
        "Have it brought to our house at {time}, for {name}.",
        "We need it delivered around {time}, under {name}.",
        "Send it over for {time}, the bell says {name}.",
        "Home delivery at {time}, name of {name}.",
        "The courier should come at {time} and look for {name}.",
        "To my door at {time}, please, I'm {name}.",
        "Ship it to {name}, it should arrive at {time}.",
    ),
    (False, True, True): (
        "I'll pick it up at {time}, the name is {name}.",
        "{name} will collect it at {time}.",
        "Pick-up at {time} for {name}.",
        "I'm coming to get it at {time}, my name is {name}.",
        "We'll come by at {time}, it's under {name}.",
        "Takeaway for {name}, ready at {time}, please.",
        "My name is {name} and I'll fetch it at {time}.",
        "I can be at the counter at {time}, name of {name}.",
        "Keep it for {name}, who picks it up at {time}.",
        "To take away at {time}, for {name}.",
        "I'll swing by around {time}, ask me for {name}.",
        "Collection at {time}, under {name}.",
        "We are walking over to grab it at {time}, I'm {name}.",
        "Have it ready at {time}, {name} is picking it up.",
        "No delivery, {name} will come in at {time}.",
        "I'll get it myself at {time}. {name} is the name.",
    ),
    (True, False, True): (
        "Deliver it to {name}, please.",
        "It's for delivery, the name is {name}.",
        "Bring it to {name}.",
        "Send it over, the bell says {name}.",
        "My name is {name}, I'd like it delivered.",
        "The driver should ask for {name}.",
        "Delivery for {name}, thanks.",
        "To our house, please, for {name}.",
    ),
    (False, False, True): (
        "I'll pick it up, the name is {name}.",
        "{name} will come and collect it.",
        "It's takeaway, for {name}.",
        "Keep it at the counter for {name}.",
        "My name is {name}, I'll fetch it myself.",
        "Pick-up for {name}, please.",
        "I'm on my way to get it, I'm {name}.",
        "No delivery needed, {name} is coming over.",
    ),
    (True, True, False): (
        "Deliver it at {time}, please.",
        "It should be at our door by {time}.",
        "Can you bring it over at {time}?",
        "Delivery for {time}, thanks.",
        "Have the driver come at {time}.",
        "We'd like it delivered at {time}.",
        "Send it to our place for {time}.",
        "Drop it off around {time}.",
    ),
    (False, True, False): (
        "I'll pick it up at {time}.",
        "We'll come and get it at {time}.",
        "Pick-up at {time}, please.",
        "I can collect it at {time}.",
        "It's to take away at {time}.",
        "Have it ready for me to fetch at {time}.",
        "I'll be at the counter around {time}.",
        "No delivery, I'm coming in at {time}.",
    ),
}

# name in the answer -> (one of it, several of it, whether it comes in sizes, {option in the answer: ways to say it})
MENU = {
    "margherita pizza": ("margherita pizza", "margherita pizzas", True, {
        "extra cheese": ("with extra cheese", "with more cheese"), "no basil": ("without basil", "with no basil"),
        "thin crust": ("on a thin crust", "with a thin crust")}),
    "pepperoni pizza": ("pepperoni pizza", "pepperoni pizzas", True, {
        "extra cheese": ("with extra cheese", "with more cheese"), "no olives": ("without olives", "with no olives"),
        "thin crust": ("on a thin crust", "with a thin crust")}),
    "mushroom pizza": ("mushroom pizza", "mushroom pizzas", True, {
        "extra garlic": ("with extra garlic", "with more garlic"), "no onions": ("without onions", "with no onions"),
        "gluten-free": ("on a gluten-free base", "gluten-free")}),
    "cheeseburger": ("cheeseburger", "cheeseburgers", False, {
        "no onions": ("without onions", "with no onions"), "no pickles": ("without pickles", "hold the pickles"),
        "extra bacon": ("with extra bacon", "with more bacon")}),
    "veggie burger": ("veggie burger", "veggie burgers", False, {
        "no tomato": ("without tomato", "with no tomato"), "extra sauce": ("with extra sauce", "with more sauce")}),
    "chicken wrap": ("chicken wrap", "chicken wraps", False, {
        "extra spicy": ("extra spicy", "really spicy"), "no mayo": ("without mayo", "hold the mayo")}),
    "falafel wrap": ("falafel wrap", "falafel wraps", False, {
        "extra sauce": ("with extra sauce", "with more sauce"), "no onions": ("without onions", "with no onions")}),
    "burrito": ("burrito", "burritos", False, {
        "no beans": ("without beans", "with no beans"), "extra spicy": ("extra spicy", "really spicy")}),
    "caesar salad": ("caesar salad", "caesar salads", True, {
        "no croutons": ("without croutons", "hold the croutons"),
        "dressing on the side": ("with the dressing on the side", "dressing on the side")}),
    "greek salad": ("greek salad", "greek salads", True, {
        "extra feta": ("with extra feta", "with more feta"), "no olives": ("without olives", "with no olives")}),
    "tomato soup": ("tomato soup", "tomato soups", True, {
        "no cream": ("without cream", "hold the cream"), "with bread": ("with bread", "with some bread")}),
    "fries": ("portion of fries", "portions of fries", True, {
        "no salt": ("without salt", "with no salt"), "with ketchup": ("with ketchup", "and ketchup with it")}),
    "latte": ("latte", "lattes", True, {
        "oat milk": ("with oat milk", "made with oat milk"),
        "extra shot": ("with an extra shot", "with one more shot")}),
    "cappuccino": ("cappuccino", "cappuccinos", True, {
        "decaf": ("decaf", "without caffeine"), "soy milk": ("with soy milk", "made with soy milk")}),
    "espresso": ("espresso", "espressos", False, {"no sugar": ("without sugar", "with no sugar")}),
    "lemonade": ("lemonade", "lemonades", True, {
        "no ice": ("without ice", "hold the ice"), "with mint": ("with mint", "with some mint")}),
    "iced tea": ("iced tea", "iced teas", True, {
        "no sugar": ("without sugar", "with no sugar"), "with lemon": ("with lemon", "with some lemon")}),
    "orange juice": ("orange juice", "orange juices", True, {"no ice": ("without ice", "hold the ice")}),
    "brownie": ("brownie", "brownies", False, {"no nuts": ("without nuts", "with no nuts")}),
    "cheesecake": ("slice of cheesecake", "slices of cheesecake", False, {
        "with berries": ("with berries", "with some berries")}),
}  # fmt: skip

QUANTITIES = {
    1: ("one", "1"),  # or a, an
    2: ("two", "2", "a couple of"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
    6: ("six", "half a dozen"),
    12: ("twelve", "a dozen"),
}

SIZES = {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}

HOURS = {12: "twelve", 1: "one", 2: "two", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}

NAMES = (
    "Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Ines", "Jonas",
    "Kira", "Liam", "Maria", "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tara",
    "Uma", "Victor", "Wanda", "Yusuf", "Zoe", "Amir", "Bella", "Chen", "Dora", "Emil",
    "Fatima", "Gina", "Hanna", "Ivan", "Julia", "Karim", "Lena", "Marco", "Nadia", "Oscar",
)  # fmt: skip
