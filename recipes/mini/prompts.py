"""Questions for seven domains, written for this project; the base answers them itself (records.py).

They show gates what a question to an assistant looks like in each domain, and keep the experts near the way in which
the base answers.
"""

from __future__ import annotations

import itertools
import random

TOPICS = {
    "law_expert": (
        "a contract; negligence; a lease; copyright; a patent; bail; an appeal; a will; bankruptcy; defamation; perjury; "
        "an injunction; the burden of proof; double jeopardy; due process; a trademark; custody of a child; eviction; "
        "liability; arbitration; a subpoena; a felony; a misdemeanour; fraud; a power of attorney; a plea bargain; "
        "the statute of limitations; breach of contract; product liability; a non-disclosure agreement; probate; "
        "judicial review; a tort; an easement; habeas corpus; a jury trial; a deposition; sovereign immunity; a warranty; "
        "consideration in contract law"),
    "finance_expert": (
        "a bond; inflation; a mutual fund; compound interest; a mortgage; a balance sheet; cash flow; a credit score; "
        "a dividend; GDP; a stock split; an index fund; depreciation; working capital; a hedge fund; the money supply; "
        "a budget deficit; an exchange rate; a recession; monetary policy; a 401(k); an initial public offering; "
        "gross margin; a trade deficit; short selling; a derivative; liquidity; an audit; double-entry bookkeeping; "
        "net present value; a central bank; market capitalization; a price-to-earnings ratio; amortization; equity; "
        "an annuity; venture capital; an income statement; supply and demand; opportunity cost"),
    "medical_expert": (
        "asthma; high blood pressure; a migraine; pneumonia; type 2 diabetes; anaemia; arthritis; a stroke; measles; "
        "hepatitis B; an ulcer; epilepsy; osteoporosis; the flu; gout; a heart attack; eczema; tuberculosis; malaria; "
        "Alzheimer's disease; Parkinson's disease; a kidney stone; hypothyroidism; appendicitis; bronchitis; a concussion; "
        "insomnia; depression; leukaemia; high cholesterol; celiac disease; glaucoma; sepsis; an allergy to peanuts; "
        "a urinary tract infection; chickenpox; heart failure; cirrhosis; lupus; a vitamin D deficiency"),
    "text_expert": (
        "a lighthouse keeper; the French Revolution; an old clock; the city of Venice; a sailor's last voyage; autumn; "
        "William Shakespeare; a lost letter; the Roman Empire; a winter morning; a fox and a crow; Mount Everest; "
        "the Silk Road; a railway journey; Jane Austen; a village fair; the invention of printing; a storm at sea; "
        "two brothers; the river Nile; a castle; an orphan girl; Napoleon; the first day of school; a garden; "
        "ancient Greece; a musician; the moon; a stranger at the door; Leonardo da Vinci; a desert; the Vikings; "
        "an old soldier; a ship in a bottle; the Amazon rainforest; a painter; a wedding; the Great Wall of China; "
        "a mother's advice; honey bees"),
}
FORMS = {
    "law_expert": ("What is {} in law?", "Explain {} in simple terms.", "What does the law say about {}?",
                   "My lawyer spoke of {}. What did she mean?"),
    "finance_expert": ("What is {}?", "Explain {} to a beginner.", "Why does {} matter to an investor or a company?",
                       "How is {} measured or used in finance?"),
    "medical_expert": ("What are the symptoms of {}?", "How is {} treated?", "What causes {}?",
                       "My father has {}. What should we know?"),
    "text_expert": ("Write a short paragraph about {}.", "Tell me a story about {}.", "Describe {}.",
                    "What would a novelist write about {}?"),
}
CODE = (
    "reverses a string; checks whether a number is prime; computes the factorial of n; merges two sorted lists; "
    "counts the words of a text; finds the largest item of a list; removes duplicates from a list; sorts a dictionary by "
    "its values; reads a CSV file; checks whether a string is a palindrome; returns the n-th Fibonacci number; flattens a "
    "nested list; computes the mean and the median; does a binary search; converts Celsius to Fahrenheit; counts vowels; "
    "finds common elements of two lists; transposes a matrix; validates an e-mail address; writes JSON to a file; "
    "generates a random password; computes the greatest common divisor; groups words by their first letter; implements a "
    "stack; implements a queue with two stacks; parses a date; lists the files of a folder; rotates "
    "a list by k places; sums the digits of a number; finds the longest word; multiplies two matrices; implements bubble "
    "sort; implements quicksort; checks balanced brackets; counts how often each letter occurs; swaps two variables; "
    "computes a running total; finds missing numbers in a range; converts a number to binary; implements a linked list")
CODE_FORMS = ("Write a Python function that {}.", "How do I write code that {}? Show an example in Python.",
              "I need a small program that {}.", "Implement a function that {} and explain it.")
MATH = (
    "{a} + {b} * {c}; {a} percent of {d}; the area of a rectangle of {a} by {b}; the average of {a}, {b} and {c}; "
    "the perimeter of a square with sides of {a} cm; {d} divided by {b}; the next number after {b}, {e}, {f}")
MATH_FORMS = (
    "What is {}?", "Calculate {} and show the steps.",
    "Tom has {a} apples. He buys {b} more and gives {g} away. How many has he left?",
    "A train travels {d} km in {b} hours. What is its average speed?",
    "A shirt costs ${d} and is reduced by {a} percent. What is the new price?",
    "Solve for x: {b}x + {a} = {d}.", "If {b} pens cost ${e}, how much do {c} pens cost?",
    "A class has {d} pupils. {a} percent of them are girls. How many boys are there?")
DIALOGUE = (
    "Hi! I'd like to book a table for {n} tonight.; Hello, can you help me order a pizza?; What time does the movie "
    "start?; I need a taxi to the airport at {n} o'clock.; Could you find me a hotel for {n} nights?; Hi there, how are "
    "you today?; I want to return the shoes I bought.; Can you remind me to call my sister?; I'd like {n} coffees to go, "
    "please.; Do you have any tickets left for Saturday?; Thanks a lot, that is all for now.; Which restaurant would you "
    "recommend nearby?; I want to change my reservation to {n} people.; Is there a bus to the centre?; Please play some "
    "jazz.; I'd like to see a doctor this week. Which days are free?; What's the weather like tomorrow?; Good morning! "
    "I am looking for an apartment with {n} rooms.; Could you book {n} seats for the late show?; My order has not arrived "
    "yet.; Can I pay by card?; I would like a haircut on Friday.; Let's meet for lunch. When are you free?; Sorry, I "
    "meant {n}, not two.; Hello? Is anyone there?")


def prompts(name: str, seed: int = 0) -> list[str]:
    """All prompts of a name, in an order that the seed decides."""
    draw = random.Random(f"{name}/{seed}")
    if name in TOPICS:
        out = [form.format(topic.strip()) for topic in TOPICS[name].split(";") for form in FORMS[name]]
    elif name == "code_expert":
        out = [form.format(task.strip()) for task in CODE.split(";") for form in CODE_FORMS]
    elif name == "math_expert":
        out = []
        for _, form in zip(range(160), itertools.cycle(MATH_FORMS), strict=False):
            b, a = draw.randint(2, 9), draw.randint(11, 60)
            numbers = {"a": a, "b": b, "c": draw.randint(2, 9), "d": b * draw.randint(12, 60), "e": 2 * b, "f": 3 * b,
                       "g": draw.randint(1, 9)}
            inner = draw.choice(MATH.split(";")).strip().format(**numbers)
            out.append(form.format(inner, **numbers))
    elif name == "dialogue_expert":
        out = [line.strip().format(n=n) for line in DIALOGUE.split(";") for n in (2, 3, 4, 5, 6)]
    else:
        raise ValueError(f"name = {name!r}: has no prompts")
    out = list(dict.fromkeys(out))
    draw.shuffle(out)
    return out
