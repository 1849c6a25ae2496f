"""A pack with a page and routes of its own, which reads every prompt, as well-known ones do."""

from aiohttp import web
from server import PromptServer

seen = []


@PromptServer.instance.routes.get("/neighbour/prompts")
async def prompts(_request):
    return web.json_response({"seen": len(seen)})


def read(prompt):
    seen.append(prompt)
    return prompt


PromptServer.instance.add_on_prompt_handler(read)


class NeighbourNote:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"default": ""})}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "keep"
    CATEGORY = "neighbours"

    def keep(self, text):
        return {"ui": {"text": [text]}}


WEB_DIRECTORY = "web"
NODE_CLASS_MAPPINGS = {"NeighbourNote": NeighbourNote}
